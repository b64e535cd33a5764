"""Result rows: their columns, the Parquet files that hold them, and the manifest that says what they were made from."""

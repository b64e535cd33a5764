"""Take the text out of documents: a module each for PDF, DOCX, EPUB and HTML, with a function `convert`.

They run in processes of their own (`child`), which `pipeline.source.processes` starts, limits and ends: parsers hang
and crash. So nothing here imports more of the pipeline than `decoding`, and starting is quick.
"""

"""Keys and values of the documents: the arena that holds them, and the cache through which a model writes them."""

"""How each kind of kernel is made; a recipe fills a directory and says what is in it."""

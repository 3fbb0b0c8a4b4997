"""Problems, language-model states, and the files that hold them."""

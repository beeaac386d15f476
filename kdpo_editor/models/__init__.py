"""Models and tokenizers, loaded alike wherever one is needed: by hub id, from a folder, a package or a file."""

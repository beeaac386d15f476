"""KDPO-L: many edits of one model, each kept while later ones are made, and what the model knows besides spared."""

"""Side-by-side comparison of editing methods."""

"""Shows a comparison: tables, figures, a page."""

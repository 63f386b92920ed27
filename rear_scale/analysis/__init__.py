"""The papers' analyses of trained models, one file per family of figures; table.py lists them."""

"""Files of the wider field, in and out."""

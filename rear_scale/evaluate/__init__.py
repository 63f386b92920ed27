"""Images -> scores."""

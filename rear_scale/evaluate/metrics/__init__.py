"""What is computed of features and images."""

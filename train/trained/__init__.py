"""What is measured on the networks of finished runs."""

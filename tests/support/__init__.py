"""Small real models, data and processes, which several test files share."""

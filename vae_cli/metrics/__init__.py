"""What is measured of a model: one class a metric, its figures with their units, counts and errors."""

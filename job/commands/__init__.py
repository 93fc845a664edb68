"""What a person types. No other package imports it."""

"""Us against others: speed (`bench`)."""

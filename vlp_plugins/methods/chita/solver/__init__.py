"""The solver of CHITA's problem; it takes weights and rows, and knows no model."""

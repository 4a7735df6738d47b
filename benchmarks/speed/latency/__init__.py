"""What users feel of structured pruning: time, parameters, operations, memory."""

"""What a model costs: time, operations, memory."""

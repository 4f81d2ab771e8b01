"""From context to memory, from memory to weights: the teacher is the model with a context, the student the model without."""

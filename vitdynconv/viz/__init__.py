"Pictures from live tensors."

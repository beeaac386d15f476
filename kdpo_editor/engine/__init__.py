"""What an edit runs on: the cached forward, batches, steps, optimisers and the matrices themselves."""

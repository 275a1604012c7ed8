"""Records, their tokens and the global minibatches drawn from them."""

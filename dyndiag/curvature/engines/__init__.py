"""Routes to a product with the Hessian of a loss: one file each, and the check of them."""

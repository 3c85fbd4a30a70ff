"""Code shared by several families of ops: argument handling, products, rounding. Not an op itself."""

"""What several families of ops share: products, rounding. No op itself."""

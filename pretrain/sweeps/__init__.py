"""Methods that spend short runs to learn a mixture: designs, fits, and the policies that they end in."""

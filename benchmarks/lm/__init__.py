"""Language modelling against equals: the arms, what they read, how they are trained and judged."""

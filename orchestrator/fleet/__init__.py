"""Many runs: the plan of runs on a capacity, the supervisor that carries it out, and what people see of it."""

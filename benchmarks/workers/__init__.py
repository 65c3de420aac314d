"""What entry scripts start in fresh processes with `in_ranks`, once for each side or part of a comparison."""

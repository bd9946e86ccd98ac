"""Small tasks with right answers, models of equal size that learn them, and the loop that trains."""

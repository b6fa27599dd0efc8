"""The embedded default: a task, its tokenizer, a teacher, a student, and the recipe that rebuilds them."""

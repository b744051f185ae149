"""What is no lesson: nobody needs it to understand a run. Each file says what it is for."""

"""In the processes that run the model: both model runners, and what is added to the layers."""

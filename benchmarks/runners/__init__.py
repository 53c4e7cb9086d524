"""One runner per framework; each loads a job and times it inside a worker process."""

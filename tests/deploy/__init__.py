"""`make test-deploy`: the image and docker-compose.yml in real containers, from a fresh clone."""

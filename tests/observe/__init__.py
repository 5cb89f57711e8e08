"""`make test-observe`: the dashboard, the alerts and Flower, with a real Prometheus, a real Flower and real workers.

`make screenshots`: the pictures in docs/pictures, with a real terminal (tmux) and a real browser (headless Chromium).

The files are not named as tests, so that `make test` leaves them out: they wait for scrapes.
"""

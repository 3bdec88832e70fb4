"""`gck demo`: one small training run per configuration, over slow links, compared in a table.

settings.py        what is the same for every configuration, as the workers receive it
configurations.py  name -> the hook that DDP gets
model.py           the network and the images
worker.py          one training process
crew.py            starts the workers of one configuration, listens to them, ends them
runner.py          the whole demo, with its progress bars
report.py          table, picture, JSON
"""

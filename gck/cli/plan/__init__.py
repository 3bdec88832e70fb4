"""`gck plan`: whether compressing pays on a link, and which compressor, before anybody trains.

settings     what the user says of model, world and link
compressors  the candidates, and how they are written on the command line
estimate     what each of them sends and takes: the model of `gck.collectives.cost`, and what is measured
report       table, advice, picture and JSON
command      the command itself
"""

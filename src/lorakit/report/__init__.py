"""What was planned or measured, drawn for a person to read: values in, text out, and nothing is read or written here.

words.py    bytes, operations and seconds in words
html.py     text that is escaped by the way it is built, tables, stacked bars, and the page around them
page.css    how every page looks, on a screen, on a telephone, in the dark and on paper
plan.py     the page of `lorakit plan`
"""

"""Hosts: mixtures, training and merges with diffusers, transformers, PEFT, Ray, accelerate and huggingface_hub.

`api` has the entry points for any kind of model. Only the module or folder of a library imports that library.
"""

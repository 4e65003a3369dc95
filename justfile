# `just` lists the recipes; each is the command you would type.
export PYTHONSAFEPATH := "1"

default:
    @just --list

# everything a commit must pass
check: lint types test

lint:
    ruff check .
    ruff format --check .

types:
    pyright

test *args:
    pytest {{ args }}

# rewrite the files the way `lint` wants them
format:
    ruff check --fix .
    ruff format .

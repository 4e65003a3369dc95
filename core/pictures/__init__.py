"""Pictures: a canvas, charts, gate maps, and sheets of pictures with the grid behind them."""

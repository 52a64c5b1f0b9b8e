"""A program of the user's: the app of the tests in Flower's simulation, as `python simulated.py OUT NODES PATIENCE`."""

import sys
from pathlib import Path

from fedavg_app import client_app, server_app
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

out, num_nodes, patience = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
app = ServerApp()


@app.main()
def main(grid: Grid, _: Context) -> None:
    """All the runs."""
    server_app.everything(grid, out, num_nodes, patience)


run_simulation(
    app,
    client_app.app,
    num_nodes,
    backend_config={
        "client_resources": {"num_cpus": 1},
        "init_args": {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**27},
    },
)

"""Federated averaging with compressed messages in both directions.

    python examples/federated.py

Clients with data of their own train for a while. Each sends how far it came as bytes, which a server adds up
with a weight for each, and sends the sum back, compressed as well. What a message leaves out stays in a
residual, of the client or of the server, and is sent later. Everything runs in one process: a network would
be where messages are made and read. The task is made up: a network learns to imitate another one.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017),
algorithm 1, for the averaging.
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gck

CLIENTS, TOGETHER, ROUNDS, LOCAL_STEPS = 8, 4, 40, 10


def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
    shared = parameters_to_vector(model.parameters()).detach()
    # Every client has another number of examples, of its own corner of the space.
    inputs = [torch.randn(32 * (i + 1), 32) + 0.3 * torch.randn(32) for i in range(CLIENTS)]
    with torch.no_grad():
        examples = [(x, teacher(x)) for x in inputs]
    residuals = [torch.zeros_like(shared) for _ in range(CLIENTS)]
    server_residual = torch.zeros_like(shared)
    sent = 0

    for step in range(1, ROUNDS + 1):
        chosen = torch.randperm(CLIENTS)[:TOGETHER].tolist()
        messages = []
        for i in chosen:
            gone = shared - train(model, shared, examples[i])
            payload = gck.quantize_ef_(gone, residuals[i], bits=4)
            messages.append(gck.to_bytes(payload))  # client to server
        sent += sum(map(len, messages))

        # A message that is damaged, or of another size, is a CorruptPayloadError, and adds nothing. What a
        # client says is not judged: a server of strangers clips updates, and looks for what is not finite.
        payloads = [gck.from_bytes(message, max_numel=shared.numel()) for message in messages]
        counts = [len(inputs[i]) for i in chosen]
        update = torch.zeros_like(shared)
        gck.decompress_add_(update, payloads, [count / sum(counts) for count in counts])

        answer = gck.to_bytes(gck.quantize_ef_(update, server_residual, bits=8))  # server to all clients
        sent += CLIENTS * len(answer)
        shared -= gck.decompress(gck.from_bytes(answer))  # the same on the server and on every client
        if step % 10 == 0:
            print(f"round {step}: loss {loss_of(model, shared, examples):.4f}")
    dense = ROUNDS * (TOGETHER + CLIENTS) * 4 * shared.numel()
    print(f"sent {sent:,} bytes, {dense / sent:.1f} times less than fp32")


def train(model: nn.Module, start: torch.Tensor, examples: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The parameters after some steps on one client."""
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(LOCAL_STEPS):
        optimizer.zero_grad()
        mse_loss(model(examples[0]), examples[1]).backward()
        optimizer.step()
    return parameters_to_vector(model.parameters()).detach()


@torch.no_grad()
def loss_of(
    model: nn.Module, shared: torch.Tensor, examples: list[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    vector_to_parameters(shared.clone(), model.parameters())
    return sum(mse_loss(model(x), y).item() for x, y in examples) / len(examples)


if __name__ == "__main__":
    main()

// Asks the server for an answer, and hands on what its stream tells.

/**
 * Streams one answer.
 * @param {object} body - the request, without what streaming needs.
 * @param {string} key - the API key; empty: none.
 * @param {AbortSignal} signal - hangs up.
 * @param {(choice: object) => void} onChoice - called with each choice of a chunk.
 * @returns {Promise<object>} the usage.
 */
export async function streamAnswer(body, key, signal, onChoice) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { ...body, stream: true, stream_options: { include_usage: true }, details: true };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw new Error(await errorOf(response));
  let usage = null;
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      finished = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    chunk.choices.forEach(onChoice);
    usage = chunk.usage ?? usage;
  }
  if (!finished) throw new Error("the connection was lost before the answer was complete");
  return usage;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

// The data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

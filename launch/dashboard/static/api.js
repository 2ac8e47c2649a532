// Requests to the server that the page came from. Entity tags save what has not changed.

export class ApiError extends Error {}

/** JSON of a GET; raises ApiError with the server's line. */
export async function get(path) {
  return read(await ask(path, {}));
}

/** {tag, tree}: tree is null when what has `tag` is still the newest. */
export async function getNew(path, tag) {
  const response = await ask(path, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
  if (response.status === 304) return { tag, tree: null };
  return { tag: response.headers.get("etag"), tree: await read(response) };
}

/** JSON of a POST with the token in a header. */
export async function post(path, token, tree) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
  return read(await ask(path, { method: "POST", headers, body: JSON.stringify(tree) }));
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch {
    throw new ApiError("the dashboard's server does not answer; it may have been ended");
  }
}

async function read(response) {
  const tree = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok) throw new ApiError(tree.error ?? `HTTP ${response.status}`);
  return tree;
}

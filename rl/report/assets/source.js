// Where a run's trajectories and timeline come from: blocks inside this page, or the server that sent it.

const BLOCKS_KEPT = 48; // unpacked ones, so that a long visit does not hold all of a large run

async function unpack(base64) {
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

async function ask(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `status ${response.status}`);
  return response.json();
}

class Source {
  constructor(number, live) {
    this.number = number;
    this.live = live;
    this.unpacked = new Map();
  }

  // A block's value; the same promise as long as it is kept.
  block(name) {
    let value = this.unpacked.get(name);
    if (!value) {
      const inside = () => unpack(document.getElementById(`block-${this.number}-${name}`).textContent);
      value = this.live ? ask(`run/${this.number}/samples/${name}`) : inside();
      value.catch(() => this.unpacked.delete(name));
    }
    this.unpacked.delete(name); // to the end of the map, which is in the order of use
    this.unpacked.set(name, value);
    if (this.unpacked.size > BLOCKS_KEPT) this.unpacked.delete(this.unpacked.keys().next().value);
    return value;
  }

  async trajectory(summary) {
    return (await this.block(summary.block))[summary.place];
  }
}

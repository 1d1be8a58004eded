// The images that this browser keeps, in IndexedDB; one gallery for each place that a server is served from.

const STORE = "images";

/** The kept images; where the browser keeps nothing (some private windows) they last as long as the page. */
export async function openGallery() {
  let database = null;
  try {
    const opening = indexedDB.open(`lamamba ${new URL(".", document.baseURI).pathname}`, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    database = await finished(opening);
  } catch {
    database = null;
  }
  const entries = database ? await finished(database.transaction(STORE).objectStore(STORE).getAll()) : [];
  return new Gallery(database, entries.sort(newestFirst));
}

class Gallery {
  #database;

  constructor(database, entries) {
    this.#database = database;
    /** {id, blob, facts}, the newest first. */
    this.entries = entries;
  }

  /** Add an image; false if it is shown but could not be kept. */
  add(entry) {
    this.entries = [...this.entries, entry].sort(newestFirst);
    return this.#change((store) => store.put(entry));
  }

  remove(entry) {
    this.entries = this.entries.filter(({ id }) => id !== entry.id);
    return this.#change((store) => store.delete(entry.id));
  }

  clear() {
    this.entries = [];
    return this.#change((store) => store.clear());
  }

  async #change(change) {
    if (!this.#database) return false;
    const transaction = this.#database.transaction(STORE, "readwrite");
    try {
      await finished(change(transaction.objectStore(STORE)));
      return true;
    } catch {
      return false; // the disk is full, or the browser gives this page no more of it
    }
  }
}

// Ids are the time and the place in the request, so that they sort.
const newestFirst = (one, other) => (one.id < other.id ? 1 : -1);

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

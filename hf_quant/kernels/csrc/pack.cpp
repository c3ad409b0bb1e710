// Canonical codes to tiles and back, and rows of a weight as floating-point numbers.
#include <cstring>

#include "convert.h"
#include "linear.h"

namespace hfq {
namespace {

// 8 codes of a row, column k in nibble k, to the order of a block: columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest.
uint32_t to_block4(uint32_t u) {
  uint32_t even = u & 0x0f0f0f0f, odd = (u >> 4) & 0x0f0f0f0f;
  even = (even | (even >> 4)) & 0x00ff00ff;
  odd = (odd | (odd >> 4)) & 0x00ff00ff;
  return ((even | (even >> 8)) & 0xffff) | ((odd | (odd >> 8)) << 16);
}

uint32_t from_block4(uint32_t v) {
  uint32_t even = v & 0xffff, odd = v >> 16;
  even = (even | (even << 8)) & 0x00ff00ff;
  odd = (odd | (odd << 8)) & 0x00ff00ff;
  even = (even | (even << 4)) & 0x0f0f0f0f;
  odd = (odd | (odd << 4)) & 0x0f0f0f0f;
  return even | (odd << 4);
}

// Position in the 8 bytes (two times 4) of a row in an 8-bit block -> column.
constexpr int kColumnAt[8] = {0, 4, 1, 5, 2, 6, 3, 7};

struct Repack {
  const uint8_t* from;
  uint8_t* to;
  int64_t out, in;
  int32_t bits;
};

int64_t canonical_row_bytes(int64_t in, int32_t bits) { return bits == 8 ? in : (in + 1) / 2; }

void pack_tile(const Repack& p, int64_t tile) {
  const int64_t row_bytes = canonical_row_bytes(p.in, p.bits), blocks = ceil_div(p.in, kBlockColumns);
  const int64_t block_bytes = 16 * p.bits;
  const int64_t rows = p.out - tile * 16 < 16 ? p.out - tile * 16 : 16;
  uint8_t* to = p.to + tile * blocks * block_bytes;
  for (int64_t b = 0; b < blocks; ++b, to += block_bytes) {
    const int64_t left = p.in - b * 8, columns = left < 8 ? left : 8;
    for (int64_t r = 0; r < 16; ++r) {
      if (r >= rows) {
        memset(to + 4 * r, 0, 4);
        if (p.bits == 8) memset(to + 64 + 4 * r, 0, 4);
        continue;
      }
      const uint8_t* row = p.from + (tile * 16 + r) * row_bytes + b * p.bits;
      if (p.bits == 4) {
        uint32_t u = 0;
        if (columns == 8) {
          u = row[0] | row[1] << 8 | row[2] << 16 | static_cast<uint32_t>(row[3]) << 24;
        } else {
          for (int64_t k = 0; k < columns; ++k) {
            u |= static_cast<uint32_t>((row[k / 2] >> (4 * (k % 2))) & 15) << (4 * k);
          }
        }
        const uint32_t v = to_block4(u);
        for (int k = 0; k < 4; ++k) to[4 * r + k] = static_cast<uint8_t>(v >> (8 * k));
      } else {
        for (int k = 0; k < 8; ++k) {
          to[(k / 4) * 64 + 4 * r + k % 4] = kColumnAt[k] < columns ? row[kColumnAt[k]] : 0;
        }
      }
    }
  }
}

void unpack_tile(const Repack& p, int64_t tile) {
  const int64_t row_bytes = canonical_row_bytes(p.in, p.bits), blocks = ceil_div(p.in, kBlockColumns);
  const int64_t block_bytes = 16 * p.bits;
  const int64_t rows = p.out - tile * 16 < 16 ? p.out - tile * 16 : 16;
  const uint8_t* from = p.from + tile * blocks * block_bytes;
  for (int64_t b = 0; b < blocks; ++b, from += block_bytes) {
    const int64_t left = p.in - b * 8, columns = left < 8 ? left : 8;
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* row = p.to + (tile * 16 + r) * row_bytes + b * p.bits;
      if (p.bits == 4) {
        const uint8_t* v = from + 4 * r;
        const uint32_t u = from_block4(v[0] | v[1] << 8 | v[2] << 16 | static_cast<uint32_t>(v[3]) << 24);
        const int64_t bytes = (columns + 1) / 2;
        for (int64_t k = 0; k < bytes; ++k) row[k] = static_cast<uint8_t>(u >> (8 * k));
      } else {
        for (int k = 0; k < 8; ++k) {
          if (kColumnAt[k] < columns) row[kColumnAt[k]] = from[(k / 4) * 64 + 4 * r + k % 4];
        }
      }
    }
  }
}

struct Rows {
  const hfq_weight* weight;
  const int64_t* index;  // or nullptr: first, first + 1, ...
  int64_t first, count;
  void* out;
  int64_t stride;
  int32_t dtype;
};

// One row in float32, as the reference computes it: (code - zero) * scale, or level * scale.
void decode_row(const hfq_weight& w, int64_t row, float* to) {
  const int64_t tile = row / 16, lane = row % 16, groups = groups_of(w);
  const uint8_t* codes = w.codes + tile * tile_bytes_of(w) + 4 * lane;
  const int64_t group_blocks = group_blocks_of(w);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = (tile * groups + g) * 16 + lane;
    const float scale = load_number(w.scale, at, w.scale_type);
    const int zero = w.zero ? w.zero[at] : implied_zero(w);
    float values[256];
    if (w.bits == 4) {
      for (int c = 0; c < 16; ++c) values[c] = (w.table_grid ? w.table[c] : static_cast<float>(c - zero)) * scale;
    }
    for (int64_t b = 0; b < group_blocks; ++b, to += 8) {
      const int64_t left = w.group - b * 8;
      float block[8];
      if (w.bits == 4) {
        const uint8_t* v = codes + (g * group_blocks + b) * 64;
        const uint32_t u = from_block4(v[0] | v[1] << 8 | v[2] << 16 | static_cast<uint32_t>(v[3]) << 24);
        for (int k = 0; k < 8; ++k) block[k] = values[(u >> (4 * k)) & 15];
      } else {
        const uint8_t* v = codes + (g * group_blocks + b) * 128;
        for (int k = 0; k < 8; ++k) block[kColumnAt[k]] = static_cast<float>(v[(k / 4) * 64 + k % 4] - zero) * scale;
      }
      if (left >= 8) {
        memcpy(to, block, sizeof(block));
      } else {
        memcpy(to, block, static_cast<size_t>(left) * 4);
      }
    }
  }
}

void decode_rows(int thread, int threads, void* data) {
  const Rows& job = *static_cast<const Rows*>(data);
  const hfq_weight& w = *job.weight;
  float* row = static_cast<float*>(scratch(static_cast<size_t>(w.in) * 4));
  for (int64_t i = share(job.count, thread, threads); i < share(job.count, thread + 1, threads); ++i) {
    decode_row(w, job.index ? job.index[i] : job.first + i, row);
    store_numbers(row, advance(job.out, i * job.stride, job.dtype), w.in, job.dtype);
  }
}

int threads_for(int64_t bytes, int32_t threads) {
  const int64_t useful = bytes / (64 << 10) + 1;
  return static_cast<int>(useful < threads ? useful : threads);
}

int32_t decode(const hfq_weight* w, const int64_t* index, int64_t first, int64_t count, void* out, int64_t stride,
               int32_t dtype, int32_t threads) {
  const int32_t bad = check_weight(w);
  if (bad) return bad;
  if (dtype < HFQ_F32 || dtype > HFQ_F16) return HFQ_BAD_DTYPE;
  if (count < 0 || threads < 1 || stride < w->in) return HFQ_BAD_SHAPE;
  if (!index && (first < 0 || first + count > w->out)) return HFQ_BAD_SHAPE;
  if (index) {
    for (int64_t i = 0; i < count; ++i) {
      if (index[i] < 0 || index[i] >= w->out) return HFQ_BAD_SHAPE;
    }
  }
  Rows job{w, index, first, count, out, stride, dtype};
  parallel(threads_for(count * w->in * 4, threads), decode_rows, &job);
  return HFQ_OK;
}

int32_t repack(Repack job, int32_t threads, void (*body)(int, int, void*)) {
  if (job.bits != 4 && job.bits != 8) return HFQ_BAD_WEIGHT;
  if (job.out < 1 || job.in < 1 || threads < 1) return HFQ_BAD_SHAPE;
  parallel(threads_for(hfq_codes_bytes(job.out, job.in, job.bits), threads), body, &job);
  return HFQ_OK;
}

void pack_share(int thread, int threads, void* data) {
  const Repack& job = *static_cast<const Repack*>(data);
  const int64_t tiles = ceil_div(job.out, 16);
  for (int64_t t = share(tiles, thread, threads); t < share(tiles, thread + 1, threads); ++t) pack_tile(job, t);
}

void unpack_share(int thread, int threads, void* data) {
  const Repack& job = *static_cast<const Repack*>(data);
  const int64_t tiles = ceil_div(job.out, 16);
  for (int64_t t = share(tiles, thread, threads); t < share(tiles, thread + 1, threads); ++t) unpack_tile(job, t);
}

}  // namespace
}  // namespace hfq

using namespace hfq;

int64_t hfq_codes_bytes(int64_t out, int64_t in, int32_t bits) {
  return ceil_div(out, kTileRows) * ceil_div(in, kBlockColumns) * 16 * bits;
}

int32_t hfq_pack(const uint8_t* canonical, uint8_t* tiled, int64_t out, int64_t in, int32_t bits, int32_t threads) {
  return repack(Repack{canonical, tiled, out, in, bits}, threads, pack_share);
}

int32_t hfq_unpack(const uint8_t* tiled, uint8_t* canonical, int64_t out, int64_t in, int32_t bits, int32_t threads) {
  return repack(Repack{tiled, canonical, out, in, bits}, threads, unpack_share);
}

int32_t hfq_dequantize(const hfq_weight* weight, int64_t first_row, int64_t rows, void* out, int64_t stride,
                       int32_t dtype, int32_t threads) {
  return decode(weight, nullptr, first_row, rows, out, stride, dtype, threads);
}

int32_t hfq_gather_rows(const hfq_weight* weight, const int64_t* rows, int64_t count, void* out, int64_t stride,
                        int32_t dtype, int32_t threads) {
  return decode(weight, rows, 0, count, out, stride, dtype, threads);
}

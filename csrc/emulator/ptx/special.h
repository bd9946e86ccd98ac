// Special registers: where a thread is.
#pragma once
#include "lanes.h"

namespace hope::ptx {

enum SpecialRegister : int32_t {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ, kLaneid,
  kWarpid, kClusterCtarank, kClusterNctarank, kClusterCtaidX, kClusteridX, kNclusteridX, kClusterNctaidX, kSpecials
};
inline const char* const kSpecialNames[kSpecials] = {
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
    "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank", "%cluster_nctarank", "%cluster_ctaid.x",
    "%clusterid.x", "%nclusterid.x", "%cluster_nctaid.x"};

inline void fill_special(Warp& w, const Special& s) {
  const Block& b = *w.block;
  const Shape& shape = w.grid->shape;
  uint32_t* r = static_cast<uint32_t*>(w.lanes(s.at));
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t values[kSpecials] = {
        static_cast<uint32_t>(32 * w.index + lane), 0, 0, static_cast<uint32_t>(shape.threads), 1, 1, b.x, b.y, b.z,
        shape.grid[0], shape.grid[1], shape.grid[2], static_cast<uint32_t>(lane), static_cast<uint32_t>(w.index),
        static_cast<uint32_t>(b.rank), static_cast<uint32_t>(shape.cluster), static_cast<uint32_t>(b.rank),
        static_cast<uint32_t>(b.cluster->index), shape.grid[0] / shape.cluster, static_cast<uint32_t>(shape.cluster)};
    r[lane] = values[s.which];
  }
}

}  // namespace hope::ptx

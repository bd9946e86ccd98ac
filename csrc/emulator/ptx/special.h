// Special registers: where a thread is.
#pragma once
#include "lanes.h"

namespace hope::ptx {

// Clusters lie along x; blocks have one row of threads.
struct SpecialRegister {
  const char* name;
  uint32_t (*value)(const Warp& w, const Grid& g, uint32_t lane);
};

inline const SpecialRegister kSpecials[] = {
    {"%tid.x", [](const Warp& w, const Grid&, uint32_t lane) { return 32 * w.index + lane; }},
    {"%tid.y", [](const Warp&, const Grid&, uint32_t) { return 0u; }},
    {"%tid.z", [](const Warp&, const Grid&, uint32_t) { return 0u; }},
    {"%ntid.x", [](const Warp&, const Grid& g, uint32_t) { return uint32_t(g.shape.threads); }},
    {"%ntid.y", [](const Warp&, const Grid&, uint32_t) { return 1u; }},
    {"%ntid.z", [](const Warp&, const Grid&, uint32_t) { return 1u; }},
    {"%ctaid.x", [](const Warp& w, const Grid&, uint32_t) { return w.block->x; }},
    {"%ctaid.y", [](const Warp& w, const Grid&, uint32_t) { return w.block->y; }},
    {"%ctaid.z", [](const Warp& w, const Grid&, uint32_t) { return w.block->z; }},
    {"%nctaid.x", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[0]; }},
    {"%nctaid.y", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[1]; }},
    {"%nctaid.z", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[2]; }},
    {"%laneid", [](const Warp&, const Grid&, uint32_t lane) { return lane; }},
    {"%warpid", [](const Warp& w, const Grid&, uint32_t) { return uint32_t(w.index); }},
    {"%nwarpid", [](const Warp&, const Grid& g, uint32_t) { return uint32_t(g.shape.threads / 32); }},
    {"%lanemask_eq", [](const Warp&, const Grid&, uint32_t lane) { return 1u << lane; }},
    {"%lanemask_lt", [](const Warp&, const Grid&, uint32_t lane) { return (1u << lane) - 1; }},
    {"%lanemask_le", [](const Warp&, const Grid&, uint32_t lane) { return (2u << lane) - 1; }},
    {"%lanemask_gt", [](const Warp&, const Grid&, uint32_t lane) { return ~((2u << lane) - 1); }},
    {"%lanemask_ge", [](const Warp&, const Grid&, uint32_t lane) { return ~((1u << lane) - 1); }},
    {"%cluster_ctarank", [](const Warp& w, const Grid&, uint32_t) { return uint32_t(w.block->rank); }},
    {"%cluster_nctarank", [](const Warp&, const Grid& g, uint32_t) { return uint32_t(g.shape.cluster); }},
    {"%cluster_ctaid.x", [](const Warp& w, const Grid&, uint32_t) { return uint32_t(w.block->rank); }},
    {"%cluster_ctaid.y", [](const Warp&, const Grid&, uint32_t) { return 0u; }},
    {"%cluster_ctaid.z", [](const Warp&, const Grid&, uint32_t) { return 0u; }},
    {"%cluster_nctaid.x", [](const Warp&, const Grid& g, uint32_t) { return uint32_t(g.shape.cluster); }},
    {"%cluster_nctaid.y", [](const Warp&, const Grid&, uint32_t) { return 1u; }},
    {"%cluster_nctaid.z", [](const Warp&, const Grid&, uint32_t) { return 1u; }},
    {"%clusterid.x", [](const Warp& w, const Grid& g, uint32_t) { return w.block->x / g.shape.cluster; }},
    {"%clusterid.y", [](const Warp& w, const Grid&, uint32_t) { return w.block->y; }},
    {"%clusterid.z", [](const Warp& w, const Grid&, uint32_t) { return w.block->z; }},
    {"%nclusterid.x", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[0] / g.shape.cluster; }},
    {"%nclusterid.y", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[1]; }},
    {"%nclusterid.z", [](const Warp&, const Grid& g, uint32_t) { return g.shape.grid[2]; }},
    {"%total_smem_size", [](const Warp&, const Grid& g, uint32_t) { return uint32_t(g.shape.shared_bytes); }},
};

inline void fill_special(Warp& w, const Special& s) {
  uint32_t* r = static_cast<uint32_t*>(w.lanes(s.at));
  for (uint32_t lane = 0; lane < 32; ++lane) r[lane] = kSpecials[s.which].value(w, *w.grid, lane);
}

}  // namespace hope::ptx

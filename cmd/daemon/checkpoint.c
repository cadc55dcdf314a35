/*
 * cmd/daemon/checkpoint.c - checkpoints, suspended VMs and schedules, as the supervisor sees them.
 *
 *   request      carried out by                          on the way
 *   checkpoint   session "checkpoint" of the VM          progress
 *   restore      session "restore" of the new VM; once   progress, then {"event":"running"}; with `wait` the
 *                the guest runs its role is "fill"       answer comes when all memory is there
 *   clone        session "clone"                         progress
 *   catalog      ls, show: a worker                      -
 *                else a session "catalog"                progress
 *   schedule     at once                                 -
 *   suspend_all, resume_all, fill_key                    {"event":"started"}, {"event":"vm"}: batch.c
 *
 * A session without a VM of its own (clone, catalog) is cancelled when the client that asked for it goes
 * away; all others go on. `lifeboat cancel NAME` stops a checkpoint, a suspend and a restore; nothing stops
 * a fill: its guest runs.
 *
 * What is said, as JSON. Sizes are bytes, times ms, `created_ms` and the like wall clock; a number that is
 * not known is null.
 *
 * Events
 *   {"event":"started","vm":"web1","session":"..."}
 *   {"event":"progress","vm":"web1","what":"suspend"|"checkpoint"|"resume"|"restore"|"fill"|"clone"|"verify"|"prune"|
 *    "rm"|"export"|"import","phase":"copying", "state": as phase,"percent":41.5,"done_bytes":N,"total_bytes":N,
 *    "file_bytes":N,"bytes_per_s":N,"eta_s":N|null,"note":"..."}
 *   {"event":"running","vm":"web1","result":{as the result of restore}}       lazy: memory still comes
 *   {"event":"vm","what":"suspend"|"resume"|"key","vm":"web1","ok":true,"done":1,"total":5,"message":"","remedy":""}
 *                                                                             one VM of suspend_all ... is done
 * Results
 *   checkpoint   {"vm","ref":"web1@7","path","number":7,"label","suspend":false,"increment":true,"encrypted":false,
 *                 "pages","zero_pages","same_pages","unchanged_pages","delta_pages","stored_pages","raw_bytes",
 *                 "file_bytes","rounds","disks":1,"pause_ms","total_ms"}
 *   restore      {"vm","ref","resumed":false,"filling":true,"running_ms","total_ms","ram_bytes","placed_bytes"}
 *                with `wait`: when all is there, "filling":false and total_ms, placed_bytes of all
 *   clone        {"ref","clones":[{"name","running_ms"}]}; also the failure's, with those that run
 *   catalog ls   {"checkpoints":[C ...]}
 *     C          {"ref":"web1@7","vm","number":7 (0: suspend),"suspend","label","created_ms","pause_ms","path",
 *                 "file_bytes","encrypted","key":"none"|"file"|"passphrase","increment","id","parent":"" or id,
 *                 "depth":3 (files a restore reads, 0: a parent is missing),"no_disk","ram_bytes","pages",...
 *                 "raw_bytes" (as in checkpoint),"readable":true,"error":"" ,"remedy":""}
 *                 not readable: what is not known is null
 *   catalog show C and "disks":[{"id","path","argv_path","format","size_bytes"}],"chain":["web1@7","web1@6",...],
 *                 "machine","accel","cpu_model","vcpus","hv_version"
 *   verify       {"ok":false,"checked":[{"ref","path","ok","problems":["..."]}],"problems":["..."]}
 *   rm, prune    {"refs":["web1@3"],"removed":1,"joined":1,"images_joined":1,"images_kept":0,"freed_bytes"}
 *                 dry_run: {"would_remove":["web1@3",...]}
 *   export       {"ref","to"}
 *   import       C
 *   schedule     {"vm","every_ms","keep","no_disk","key_file","last_ms" (0: never),"next_ms","failures","error"};
 *                off or none: {"vm","every_ms":0}. every_ms 0 and not off: only asked
 *   suspend_all  {"done":[{"vm",result of checkpoint}],"failed":[{"vm","message","remedy"}],
 *                 "left":[{"vm","state","message","remedy"}]}   left: protected, or not one that can be suspended
 *   resume_all   {"done":[{"vm",result of restore}],"failed":[...],"left":[...]}
 *   fill_key     {"done":[{"vm"}],"failed":[...],"left":[]}
 *
 * In ls, status and show a VM has besides
 *   "checkpoint"  the registry's: "web1@7", the last one taken or the one it comes from; ""
 *   "suspended"   {"ref","path","file_bytes","since_ms"} in state suspended
 *   "fill"        {"percent","problem":""} in state filling; percent null: nobody fills at the moment
 *   "schedule"    as above, when there is one
 */
